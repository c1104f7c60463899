"""Write the cards of models and datasets: text, metadata, loss curve, and the commands that repeat the run."""
