"""Storage on disk: files that are written whole or not at all, run folders, checkpoints, client states."""
