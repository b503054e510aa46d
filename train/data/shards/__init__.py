"""A corpus as shards: pieces that many processes tokenise, and that a kill leaves whole."""
