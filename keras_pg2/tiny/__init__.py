"""A tiny PaliGemma 2, made from nothing: what it takes to make it, and the files it is."""
