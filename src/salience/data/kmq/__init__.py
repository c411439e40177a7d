"""k-means-quality selection and its iterative refinement: cover every cluster, prefer quality inside."""
