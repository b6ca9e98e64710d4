"""The report: what it holds, how it checks itself, how it looks."""
