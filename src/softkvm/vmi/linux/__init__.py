"""A Linux guest, understood from its memory alone: no System.map, no debug package, no profile."""
