"""The report's figures as Plotly JSON: plain dictionaries that Plotly draws in the browser.

There is a module for each group of figures; `page` puts them together. A colour is written as "var(--name)", a variable
of the page's style sheet: the page's script replaces it by that variable's value in the light or the dark theme.
"""
