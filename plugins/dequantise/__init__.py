"""DequantizeLinear of matrices on the GPU: rows of a table in few bits, or a weight whose product needs it whole."""
