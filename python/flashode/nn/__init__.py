"""Models made of ordinary differential equations, as Modules: blocks, flows, latent and stochastic ones, mechanics."""
