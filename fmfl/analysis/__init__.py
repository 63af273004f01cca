"""Analysis: statistics, tables, claims, figures and the loss landscape."""
