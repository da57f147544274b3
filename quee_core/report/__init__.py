"""The report of a finished sweep: its figures, and the self-contained page that shows them."""
