# syntax=docker/dockerfile:1
# One image for all services, the migrations and the administrator's commands; the command says which.

FROM node:22-slim AS page
WORKDIR /page
COPY services/api_gateway/page/package.json services/api_gateway/page/package-lock.json ./
RUN --mount=type=cache,target=/root/.npm npm ci --ignore-scripts --no-audit --no-fund

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /venv
COPY requirements/services.txt /build/
# The file is complete and every line has its hash, so nothing is resolved. Modules are compiled here, as
# nothing can be written later.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /venv/bin/python install --require-hashes --no-deps --no-input --only-binary :all: \
        -r /build/services.txt
WORKDIR /app
COPY alembic.ini ./
COPY migrations/ migrations/
COPY shared/ shared/
COPY services/ services/
COPY --from=page /page/node_modules services/api_gateway/page/node_modules
# Readable for the user of the image also when it is built from a clone that is not.
RUN chmod -R a+rX . && /venv/bin/python -m compileall -q -j 0 .

FROM python:3.13-slim
RUN useradd --system --uid 10001 --user-group --home-dir /nonexistent --shell /usr/sbin/nologin foliotick
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
CMD ["python", "-m", "services.admin", "--help"]
