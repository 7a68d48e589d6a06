"""What `alignjax.inspect` shows of a run, in the terminal and as a page."""
