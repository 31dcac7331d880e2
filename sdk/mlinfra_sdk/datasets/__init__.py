"""Datasets of ``data=``: local folders and URLs as read-only folders on a machine."""
