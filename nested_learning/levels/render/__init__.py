"""Nested systems as text, Mermaid flowchart and picture; each renderer takes levels and transfers."""
