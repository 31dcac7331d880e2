"""mlinfra-sdk: run Python code on a remote machine as if it were local."""
