"""The layers that replace target modules."""
