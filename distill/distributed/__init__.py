"""Between ranks: the store, groups, and the edges that boundaries travel on."""
