"""From glass to arrays: slides, tissue, tiles, the store and its datasets."""
