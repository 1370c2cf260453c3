"""One walk over a model with calibration data, and observers that take notes on the way."""
