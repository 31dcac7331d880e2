"""Stand-ins on loopback for services that tests cannot reach; real clients talk to them."""
