"""OutRank: rank columns by mutual information that noise of high cardinality cannot fool."""
