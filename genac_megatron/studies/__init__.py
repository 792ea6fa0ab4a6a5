"""Studies: runs that differ in one thing, over seeds, and the table and plots that come of them."""
