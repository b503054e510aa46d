"""One layer of the transformer, and the modules behind the last one."""
