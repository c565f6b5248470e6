"""Measurements of trained models: bits/dim and image quality."""
