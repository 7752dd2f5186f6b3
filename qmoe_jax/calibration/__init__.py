"""Calibration: text to tokens, the host buffer of hidden states, dispatch and Hessians."""
