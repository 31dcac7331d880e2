"""Start the agent: ``python -m mlinfra_sdk.worker DIRECTORY``."""

from mlinfra_sdk.worker.process import main

main()
