<html>
<head><meta charset="${response.charset}"><title>${self.heading()}</title></head>
<body class="${tmpl_context.mood}">
  ${tg.flash_obj.render('flash', use_js=False)|n}
  <p>${_('Hello')} ${tg.request.host} ${url('/a', dict(b=1, c=2))} ${h.shout('hi')} ${g.name} ${provided}</p>
  <p>${identity_of(tg.identity)}<br></p>
  ${self.body()}
</body>
</html>
