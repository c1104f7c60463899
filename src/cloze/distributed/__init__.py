"""The processes of a run: rendezvous, collectives, and what happens if one fails."""
