"""How fast networks are where they will be used: runtimes, timing, chains of blocks, tables, bundles."""
