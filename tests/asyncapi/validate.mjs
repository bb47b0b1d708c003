// Validates an AsyncAPI document read from standard input; prints what is wrong, as JSON.
import { readFileSync } from "node:fs";
import { Parser } from "@asyncapi/parser";

const { document, diagnostics } = await new Parser().parse(readFileSync(0, "utf8"));
console.log(JSON.stringify({ valid: document !== undefined, diagnostics }));
