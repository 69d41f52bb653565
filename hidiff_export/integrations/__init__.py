"""Names of the last release; they go with the next one."""
