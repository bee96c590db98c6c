"""One address for several servers: each request goes to the one with the least work that may know its beginning."""
