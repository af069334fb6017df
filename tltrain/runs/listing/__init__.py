"""Run folders side by side: the next free one, the table of them, and its page."""
