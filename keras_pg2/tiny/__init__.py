"""The tiny PaliGemma 2: pictures and texts that it learns from, and how well it learned them."""
