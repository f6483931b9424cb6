"""Who asks: requests and their ids, the persons behind tokens, and how much each has asked for."""
