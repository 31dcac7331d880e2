"""Machines: how one is had, kept, found again and ended, and how to talk to its agent."""
