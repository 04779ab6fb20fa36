"""What the notebooks use: explorers (widgets), exercises (claims and checks), and the way into JupyterLab."""
