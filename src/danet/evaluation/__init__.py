"""Inference by the published protocols, the scores, and the report."""
