"""Bytes on disk, whole or not at all: files, run folders, checkpoints, client states."""
