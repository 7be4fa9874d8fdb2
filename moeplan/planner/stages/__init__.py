"""The split of layers over pipeline chunks: stage problems of many layouts, their bounds, and the certified refinement."""
