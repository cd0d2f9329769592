"""`dit-trt studio`: what its page asks for, computes and shows. Only `page` imports Gradio."""
