"""Blocks that change ranks while they train."""
