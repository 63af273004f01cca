"""Interactive pieces of the notebooks. They hold no science, and nothing else imports them."""
