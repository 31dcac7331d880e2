"""``on=jupyter``: any Jupyter Server by its URL and token, also one of a JupyterHub."""
