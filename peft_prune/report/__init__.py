"""Tables and pictures of what a mask keeps. They look at the layers from outside."""
