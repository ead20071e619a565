"""Objectives, one trainer for all of them, and checkpoints."""
