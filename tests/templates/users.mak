<%inherit file="tests.templates.layout"/>
<%def name="heading()">${title}</%def>
<table>
% for number, user in enumerate(users):
<tr><td>${number}</td><td title="${user}">${user}</td></tr>
% endfor
</table>
