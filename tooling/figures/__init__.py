"""`dit-trt analyze`: a bundle and a prompt become figures, one report, and the numbers behind them."""
