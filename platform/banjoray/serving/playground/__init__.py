"""A page to try a model in a browser: HTML, CSS and JavaScript as they are sent, and the routes that send them."""
