"""How data lie on disk: class folders, tables of labels, masks, shards, and data sets known by name; nothing is decoded."""
