// Lets xterm.js style what it draws under our content security policy, which allows no inline style.
// In the place of a <style> element it gets an element that hands its text to a constructed style sheet; a style attribute is
// set through the object model.
'use strict';

const create = document.createElement.bind(document);
document.createElement = (name, options) => {
  if (name !== 'style') return create(name, options);
  const sheet = new CSSStyleSheet();
  const holder = create('template');
  const remove = holder.remove.bind(holder);
  document.adoptedStyleSheets.push(sheet);
  Object.defineProperty(holder, 'textContent', { get: () => '', set: (text) => { sheet.replaceSync(text); } });
  holder.remove = () => {
    document.adoptedStyleSheets = document.adoptedStyleSheets.filter((one) => one !== sheet);
    remove();
  };
  return holder;
};

const setAttribute = Element.prototype.setAttribute;
Element.prototype.setAttribute = function (name, value) {
  if (name === 'style') this.style.cssText = value;
  else setAttribute.call(this, name, value);
};

// Links that a program shows open nothing. Colours that a program chooses are lightened until they can be read (WCAG 1.4.3).
window.emulatorOptions = {
  fontFamily: 'ui-monospace, monospace',
  fontSize: 14,
  linkHandler: { activate: () => {} },
  minimumContrastRatio: 4.5,
  scrollback: 5000,
  theme: { background: '#0d1117', foreground: '#e6edf3' },
};
