"""Which packages a cell needs, and how a machine gets them."""
