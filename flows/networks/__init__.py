"""Small networks that are velocity fields: a perceptron for vectors, a UNet for images."""
