"""What two or more services need, a module per noun. Imports no service."""
